"""The published systems, one file each. The file of `foveating-grid` is `foveating_grid.py`."""

SYSTEMS = {
    "ram": "classify by glimpses: hard attention learned by REINFORCE (Mnih et al. 2014)",
    "foveating-grid": "find a bright cell on a grid by glimpses and warmer/colder cues, within any budget",
}
