"""The published systems, one file each. The file of `foveating-grid` is `foveating_grid.py`."""

SYSTEMS = {
    "ram": "classify by glimpses: hard attention learned by REINFORCE (Mnih et al. 2014)",
    "detection": "write boxes as a text, tuned on what detection is scored by (Pinto et al. 2023)",
    "sequential-detection": "find boxes by glimpses: what to emit, where to look, when to stop (Yeung et al. 2016)",
    "localization": "find objects by moving a box step by step: Q-learning (Caicedo & Lazebnik 2015)",
    "captioning": "say what is in an image, tuned on CIDEr-D (Rennie et al. 2017; Pinto et al. 2023)",
    "colorization": "colour grey pictures by a short code of chroma, tuned to be vivid and varied (Pinto et al. 2023)",
    "panoptic": "give every pixel a class and a thing by a short code, tuned on PQ (Pinto et al. 2023)",
    "landmarks": "walk through a volume to an anatomical landmark, from coarse to fine (Ghesu et al. 2019)",
    "seednet": "place seeds for a random walker that cuts an object out, by Q-learning (Song et al. 2018)",
    "foveating-grid": "find a bright cell on a grid by glimpses and warmer/colder cues, within any budget",
    "cutting": "cut a moving object out of a video by placing two boxes in each frame (Han et al. 2018)",
    "registration": "lay a picture over another that looks different, step by step (Sun et al. 2018)",
    "tracking": "follow objects through a video, an agent each that hears its neighbours (Jiang et al. 2019)",
    "diffusion": "tune a diffusion model on any score of its images, anchored to its start (Black et al. 2023)",
    "adversarial": "paint digits with strokes, rewarded by a discriminator, beside a plain GAN (Ganin et al. 2018)",
    "tune-segmenter": "tune any segmenter on the Dice or IoU of its masks, each pixel by its own effect",
    "tune-detector": "tune any detector on the score of its sets of boxes, each box by what the set gains from it",
    "tune-captioner": "tune any image captioner of Hugging Face, or your own, on CIDEr-D",
    "reward-model": "score pictures by what people, or a script, preferred of two (Christiano et al. 2017)",
}
