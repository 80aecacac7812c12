# The public names of d3pack.decode; each is imported when it is first used.

from d3pack.decode import noise as noise
from d3pack.decode import samplers as samplers
from d3pack.decode.carried import backbone_path as backbone_path
from d3pack.decode.carried import local_backbone as local_backbone
from d3pack.decode.carried import unpack_backbone as unpack_backbone
from d3pack.decode.codes import codebook as codebook
from d3pack.decode.decoder import Decoder as Decoder
from d3pack.decode.decoder import denoiser as denoiser
from d3pack.decode.decoder import unconditional as unconditional
from d3pack.decode.export import ExportReport as ExportReport
from d3pack.decode.export import class_folder as class_folder
from d3pack.decode.export import class_folders as class_folders
from d3pack.decode.export import export_images as export_images
from d3pack.decode.export import select_classes as select_classes
from d3pack.decode.many import export_by_workers as export_by_workers
from d3pack.decode.numerics import Numerics as Numerics
from d3pack.decode.numerics import choose_numerics as choose_numerics
from d3pack.decode.numerics import exact_numerics as exact_numerics
from d3pack.decode.numerics import reproducible_cuda as reproducible_cuda
from d3pack.decode.probes import ProbeReport as ProbeReport
from d3pack.decode.probes import make_probes as make_probes
from d3pack.decode.probes import require_probes as require_probes
from d3pack.decode.probes import verify_probes as verify_probes
from d3pack.decode.samplers import schedule as schedule
from d3pack.decode.settings import ExportSettings as ExportSettings
