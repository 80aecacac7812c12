# The public names of d3pack.encode; each is imported when it is first used.

from d3pack.encode.allocation import Allocation as Allocation
from d3pack.encode.contract import Draft as Draft
from d3pack.encode.contract import EncodeContext as EncodeContext
from d3pack.encode.contract import EncodeRun as EncodeRun
from d3pack.encode.contract import Estimate as Estimate
from d3pack.encode.contract import Job as Job
from d3pack.encode.contract import Method as Method
from d3pack.encode.contract import NoSettings as NoSettings
from d3pack.encode.contract import available_methods as available_methods
from d3pack.encode.contract import method_settings as method_settings
from d3pack.encode.contract import open_method as open_method
from d3pack.encode.driver import encode as encode
from d3pack.encode.driver import estimate_encode as estimate_encode
from d3pack.encode.embeddings import export_embeddings as export_embeddings
from d3pack.encode.embeddings import import_embeddings as import_embeddings
from d3pack.encode.plan import EncodePlan as EncodePlan
from d3pack.encode.plan import coding_within as coding_within
from d3pack.encode.plan import dtype_for as dtype_for
from d3pack.encode.plan import sigmas_of as sigmas_of
from d3pack.encode.settings import ClassCondSettings as ClassCondSettings
from d3pack.encode.settings import D3MSettings as D3MSettings
from d3pack.encode.settings import EncodeSettings as EncodeSettings
from d3pack.encode.settings import ImportSettings as ImportSettings
from d3pack.encode.settings import MinimaxSettings as MinimaxSettings
from d3pack.encode.settings import d3m_settings as d3m_settings
from d3pack.encode.teaching import open_teacher as open_teacher
