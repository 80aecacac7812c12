# The public names of d3pack.train; each is imported when it is first used.

from d3pack.train.config import PRESETS as PRESETS
from d3pack.train.config import LoopConfig as LoopConfig
from d3pack.train.config import TrainConfig as TrainConfig
from d3pack.train.data import Latents as Latents
from d3pack.train.data import Photos as Photos
from d3pack.train.data import batch_rows as batch_rows
from d3pack.train.data import cached_latents as cached_latents
from d3pack.train.data import held_out_latents as held_out_latents
from d3pack.train.data import load_photos as load_photos
from d3pack.train.diffusion import SCHEDULE as SCHEDULE
from d3pack.train.diffusion import DenoiserModule as DenoiserModule
from d3pack.train.diffusion import DiffusionTask as DiffusionTask
from d3pack.train.dit import DIT_MODELS as DIT_MODELS
from d3pack.train.dit import EXPORTED as EXPORTED
from d3pack.train.dit import VAE_FILES as VAE_FILES
from d3pack.train.dit import ClassConditioner as ClassConditioner
from d3pack.train.dit import DiTConfig as DiTConfig
from d3pack.train.dit import build_dit as build_dit
from d3pack.train.dit import export_dit as export_dit
from d3pack.train.export import write_lock as write_lock
from d3pack.train.loop import accelerator_on as accelerator_on
from d3pack.train.loop import run_stage as run_stage
from d3pack.train.rounding import in_four_bits as in_four_bits
from d3pack.train.run import train_backbone as train_backbone
from d3pack.train.settings import STAGES as STAGES
from d3pack.train.settings import TrainSettings as TrainSettings
