__version__ = "0.0.1"
from .data import Scenes, VOCSegmentation, ImageFolder, ImageMaskFolder
from .encoders import PatchEncoder, load_encoder
from .rasa import Moments, PositionMean, RASA, RASAHead
from .bias import position_r2
from .overcluster import LEOPART, overcluster
from .visualize import similarity_maps
