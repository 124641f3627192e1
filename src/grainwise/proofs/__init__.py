"""One executable claim per system (`<slug>.py`, a `PROOF`), and their recorded results (`results/<slug>.json`)."""
