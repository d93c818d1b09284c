"""Protocols: how images are cut, labels read, heads trained and scores averaged.

Every rule of evaluation has its one place here, in a module per family. Commands, the
cards stored with scores and the documentation take their values from it; mmseg configs
are held equal to it by a test.
"""

from stellar_plugin.protocols.base import *
from stellar_plugin.protocols.classification import *
from stellar_plugin.protocols.efficiency import *
from stellar_plugin.protocols.pictures import *
from stellar_plugin.protocols.probing import *
from stellar_plugin.protocols.reconstruction import *
from stellar_plugin.protocols.retrieval import *
from stellar_plugin.protocols.segmentation import *
from stellar_plugin.protocols.text import *
from stellar_plugin.protocols.unsupervised import *
