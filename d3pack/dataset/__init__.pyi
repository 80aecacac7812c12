# The public names of d3pack.dataset; each is imported when it is first used.

from d3pack.dataset.dataset import D3MDataset as D3MDataset
from d3pack.dataset.dataset import LabelTeacher as LabelTeacher
from d3pack.dataset.disk import StoreEntry as StoreEntry
from d3pack.dataset.disk import StoreIdentity as StoreIdentity
from d3pack.dataset.disk import list_stores as list_stores
from d3pack.dataset.disk import remove_store as remove_store
from d3pack.dataset.disk import store_in_use as store_in_use
from d3pack.dataset.disk import verify_store as verify_store
from d3pack.dataset.loader import D3MLoader as D3MLoader
from d3pack.dataset.order import BatchOrder as BatchOrder
from d3pack.dataset.samples import TransformError as TransformError
