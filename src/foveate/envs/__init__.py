"""Where decisions are taken: Gymnasium environments on tensors, each in lockstep and in single form.

Importing this package registers them: `import foveate.envs`, then `gymnasium.make("foveate/Glimpse-v0")`.
"""

import gymnasium

ENVIRONMENTS = {
    "foveate/Glimpse-v0": "glimpse:{}GlimpseEnv",
    "foveate/FoveatingGrid-v0": "foveating_grid:{}FoveatingGridEnv",
    "foveate/BoxSearch-v0": "box_search:{}BoxSearchEnv",
    "foveate/LandmarkWalk-v0": "landmark_walk:{}LandmarkWalkEnv",
    "foveate/Cutting-v0": "cutting:{}CuttingEnv",
    "foveate/Seeds-v0": "seeds:{}SeedsEnv",
    "foveate/Registration-v0": "registration:{}RegistrationEnv",
    "foveate/Painting-v0": "painting:{}PaintingEnv",
    "foveate/BoxTracking-v0": "box_tracking:{}BoxTrackingEnv",
}


for _name, _place in ENVIRONMENTS.items():
    gymnasium.register(
        _name,
        entry_point=f"foveate.envs.{_place.format('Single')}",
        vector_entry_point=f"foveate.envs.{_place.format('')}",
    )
