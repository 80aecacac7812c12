# The public names of d3pack; each is imported when it is first used.

from d3pack.dataset import D3MDataset as D3MDataset
from d3pack.decode import Decoder as Decoder
from d3pack.errors import BackboneError as BackboneError
from d3pack.errors import D3MError as D3MError
from d3pack.errors import HubError as HubError
from d3pack.errors import InvalidPackError as InvalidPackError
from d3pack.errors import NoSpaceError as NoSpaceError
from d3pack.errors import NotFoundError as NotFoundError
from d3pack.errors import SourceError as SourceError
from d3pack.errors import StorageError as StorageError
from d3pack.errors import UsageError as UsageError
from d3pack.format import BackboneRef as BackboneRef
from d3pack.format import Coded as Coded
from d3pack.format import FileLock as FileLock
from d3pack.format import Ledger as Ledger
from d3pack.format import Pack as Pack
from d3pack.format import Probes as Probes
from d3pack.format import Recipe as Recipe
from d3pack.format import pack_bytes as pack_bytes
from d3pack.format import read as read
from d3pack.format import write as write
from d3pack.hub import pull as pull
from d3pack.hub import push as push
from d3pack.train import train_backbone as train_backbone

__all__: list[str]
__version__: str
