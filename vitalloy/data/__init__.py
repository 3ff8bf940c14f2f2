from vitalloy.data.image_set import ImageSet
from vitalloy.data.images import IMAGE_SUFFIXES, read_image
from vitalloy.data.loading import SeededImages, SeededSampler, make_loader
from vitalloy.data.sets import Splits, load_data, load_labelled
from vitalloy.data.transforms import eval_transform, train_transform

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageSet",
    "SeededImages",
    "SeededSampler",
    "Splits",
    "eval_transform",
    "load_data",
    "load_labelled",
    "make_loader",
    "read_image",
    "train_transform",
]
