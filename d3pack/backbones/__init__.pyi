# The public names of d3pack.backbones; each is imported when it is first used.

from d3pack.backbones.adapter import apply_adapter as apply_adapter
from d3pack.backbones.adapter import check_adapter as check_adapter
from d3pack.backbones.autoencoder import Autoencoder as Autoencoder
from d3pack.backbones.autoencoder import open_autoencoder as open_autoencoder
from d3pack.backbones.autoencoder import to_uint8 as to_uint8
from d3pack.backbones.dit import DiT as DiT
from d3pack.backbones.levels import PREDICTIONS as PREDICTIONS
from d3pack.backbones.levels import Levels as Levels
from d3pack.backbones.lock import FileProgress as FileProgress
from d3pack.backbones.lock import cache_home as cache_home
from d3pack.backbones.lock import verify_files as verify_files
from d3pack.backbones.protocol import TEMPLATE as TEMPLATE
from d3pack.backbones.protocol import Backbone as Backbone
from d3pack.backbones.protocol import Condition as Condition
from d3pack.backbones.resolve import MINI_GUIDANCE as MINI_GUIDANCE
from d3pack.backbones.resolve import default_backbone as default_backbone
from d3pack.backbones.resolve import default_guidance as default_guidance
from d3pack.backbones.resolve import fetch_backbone as fetch_backbone
from d3pack.backbones.resolve import kinds as kinds
from d3pack.backbones.resolve import locate_files as locate_files
from d3pack.backbones.resolve import lock_backbone as lock_backbone
from d3pack.backbones.resolve import lock_directory as lock_directory
from d3pack.backbones.resolve import mini_directory as mini_directory
from d3pack.backbones.resolve import open_backbone as open_backbone
from d3pack.backbones.speed import enable_fast_kernels as enable_fast_kernels
