"""A miner of NATIX StreetVision (Bittensor subnet 72) that answers with a bundle.

``StreetVision(bundle).answer(jpeg)`` gives one float; ``register()`` makes the detector that the subnet's own miner
loads, ``launch()`` runs that miner. Nothing of the subnet's code is copied or patched; neither torch nor transformers
is needed. Its miners pin Python 3.10 or 3.11, of which this package runs on 3.11.
"""

from stage1_pro.integrations.streetvision.answering import Settings, StreetVision
from stage1_pro.integrations.streetvision.host import launch, register

__all__ = ["Settings", "StreetVision", "launch", "register"]
