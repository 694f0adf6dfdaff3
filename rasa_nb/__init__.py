__version__ = "0.4.1"
import lazy_loader

# A name is imported when it is first used: `import rasa_nb.matching` loads no widget, no plot, no method.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=dict(
    data=["ImageFolder", "ImageList", "ImageMaskFolder", "VOCSegmentation"],
    datasets=["list_datasets", "load_dataset"],
    reading=["Reading"],
    scenes=["Scenes"],
    patch_encoder=["PatchEncoder"],
    encoders=["load_encoder"],
    moments=["Moments", "collect_moments"],
    head=["RASAHead"],
    rasa=["PositionMean", "RASA"],
    trained=["TrainedRASA", "load_released_head"],
    measures=["layer_r2", "position_r2", "position_report"],
    baselines=["LEACE", "BlankSVD", "MeanThenRASA", "RemovePCA", "ShiftAverage"],
    matching=["LEOPART"],
    segmentation=["overcluster"],
    resolution=["resolution_curve"],
    anchoring=["GramAnchor"],
    own_shape=["overcluster_own_shape"],
    visualize=["cluster_maps", "pca_maps", "position_maps", "shift_test", "similarity_maps"],
    explorer=["explore"],
    deploy=["export_onnx", "fold", "load_from_hub", "push_to_hub"],
    linear=["linear_segmentation"],
    retrieval=["in_context"],
    keypoints=["correspondence"],
    tasks=["evaluate"],
    comparison=["compare_methods"],
    published=["list_published"],
    report=["Report"],
    reproduction=["reproduce"],
))
