__version__ = "0.0.1"
from .data import Scenes, VOCSegmentation, ImageFolder, ImageMaskFolder
from .encoders import PatchEncoder, load_encoder
from .moments import Moments, collect_moments
from .head import RASAHead
from .rasa import PositionMean, RASA
from .bias import layer_r2, position_r2, position_report
from .overcluster import LEOPART, overcluster
from .visualize import cluster_maps, pca_maps, position_maps, shift_test, similarity_maps
from .explorer import explore
from .baselines import LEACE, Auto, BlankSVD, MeanThenRASA, RemovePCA, ShiftAverage, compare_methods
from .deploy import export_onnx, fold, load_from_hub, load_released_head, push_to_hub
from .report import Report
