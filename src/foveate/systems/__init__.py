"""The published systems, one file each. The file of `foveating-grid` is `foveating_grid.py`."""

SYSTEMS = {
    "ram": "classify by glimpses: hard attention learned by REINFORCE (Mnih et al. 2014)",
    "detection": "write boxes as a text, tuned on what detection is scored by (Pinto et al. 2023)",
    "sequential-detection": "find boxes by glimpses: what to emit, where to look, when to stop (Yeung et al. 2016)",
    "captioning": "say what is in an image, tuned on CIDEr-D (Rennie et al. 2017; Pinto et al. 2023)",
    "colorization": "colour grey pictures by a short code of chroma, tuned to be vivid and varied (Pinto et al. 2023)",
    "panoptic": "give every pixel a class and a thing by a short code, tuned on PQ (Pinto et al. 2023)",
    "foveating-grid": "find a bright cell on a grid by glimpses and warmer/colder cues, within any budget",
    "tracking": "follow objects through a video, an agent each that hears its neighbours (Jiang et al. 2019)",
    "tune-segmenter": "tune any segmenter on the Dice or IoU of its masks, each pixel by its own effect",
    "tune-detector": "tune any detector on the score of its sets of boxes, each box by what the set gains from it",
    "tune-captioner": "tune any image captioner of Hugging Face, or your own, on CIDEr-D",
}
