"""From features to answers. A head knows its encoder only through the channels and strides of its maps."""

from vitalloy.heads.detect import Detections, LevelOutputs, RetinaNet
from vitalloy.heads.encoder import Encoder
from vitalloy.heads.fpn import FPN
from vitalloy.heads.segment import SemanticFPN, segmentation_loss

__all__ = ["FPN", "Detections", "Encoder", "LevelOutputs", "RetinaNet", "SemanticFPN", "segmentation_loss"]
