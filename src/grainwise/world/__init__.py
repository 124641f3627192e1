"""The microworld: pictures, clips and documents drawn from a seed, with exact ground truth at every granularity.

A `World` is a taxonomy: genera, species that differ from their siblings in one attribute of one small part, and varieties
that differ more finely still. `World.draw` shows individuals; `scenes` puts several on textured ground. Item i is the same
on every machine.
"""

from grainwise.world.individuals import CALM, Individuals, Nuisance
from grainwise.world.scenes import Scene, SceneBatch, Scenes
from grainwise.world.taxonomy import Part, Species, Variety, World

__all__ = ["CALM", "Individuals", "Nuisance", "Part", "Scene", "SceneBatch", "Scenes", "Species", "Variety", "World"]
