__version__ = "0.0.1"
from .data import Scenes, VOCSegmentation, ImageFolder, ImageMaskFolder
from .encoders import PatchEncoder, load_encoder
from .rasa import Moments, PositionMean, RASA, RASAHead
from .bias import position_r2
from .overcluster import LEOPART, overcluster
from .visualize import similarity_maps
from .baselines import LEACE, Auto, BlankSVD, MeanThenRASA, RemovePCA, ShiftAverage, compare_methods
from .deploy import export_onnx, fold, load_from_hub, load_released_head, push_to_hub
from .report import Report
