# The public names of d3pack.teachers; each is imported when it is first used.

from d3pack.teachers.patches import Cut as Cut
from d3pack.teachers.patches import Patches as Patches
from d3pack.teachers.patches import best_patches as best_patches
from d3pack.teachers.patches import collage_order as collage_order
from d3pack.teachers.patches import tile as tile
from d3pack.teachers.resnet import SAMPLES as SAMPLES
from d3pack.teachers.resnet import Muon as Muon
from d3pack.teachers.resnet import SmallResNet as SmallResNet
from d3pack.teachers.resnet import TeacherConfig as TeacherConfig
from d3pack.teachers.resnet import TrainedTeacher as TrainedTeacher
from d3pack.teachers.resnet import cache_or_work as cache_or_work
from d3pack.teachers.resnet import newton_schulz as newton_schulz
from d3pack.teachers.resnet import teacher_cache as teacher_cache
from d3pack.teachers.resnet import teacher_config as teacher_config
from d3pack.teachers.resnet import teacher_key as teacher_key
from d3pack.teachers.resnet import teacher_loss as teacher_loss
from d3pack.teachers.resnet import train_teacher as train_teacher
from d3pack.teachers.teacher import Teacher as Teacher
from d3pack.teachers.teacher import TeacherError as TeacherError
from d3pack.teachers.teacher import TransformersTeacher as TransformersTeacher
from d3pack.teachers.teacher import batched as batched
from d3pack.teachers.teacher import check_teacher as check_teacher
from d3pack.teachers.teacher import fit as fit
from d3pack.teachers.teacher import match_labels as match_labels
