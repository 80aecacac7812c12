# The public names of d3pack.format.codecs; each is imported when it is first used.

from d3pack.format.codecs.adapter import decode_adapter as decode_adapter
from d3pack.format.codecs.adapter import encode_adapter as encode_adapter
from d3pack.format.codecs.codes import Codes as Codes
from d3pack.format.codecs.codes import Coding as Coding
from d3pack.format.codecs.codes import codes_at as codes_at
from d3pack.format.codecs.codes import coding_of as coding_of
from d3pack.format.codecs.codes import decode_codes as decode_codes
from d3pack.format.codecs.codes import encode_codes as encode_codes
from d3pack.format.codecs.codes import level_bits as level_bits
from d3pack.format.codecs.files import decode_files as decode_files
from d3pack.format.codecs.files import encode_files as encode_files
from d3pack.format.codecs.labels import decode_labels as decode_labels
from d3pack.format.codecs.labels import encode_labels as encode_labels
from d3pack.format.codecs.labels import restrict_labels as restrict_labels
from d3pack.format.codecs.picks import decode_picks as decode_picks
from d3pack.format.codecs.picks import encode_picks as encode_picks
from d3pack.format.codecs.picks import encode_sets as encode_sets
from d3pack.format.codecs.prompts import decode_prompts as decode_prompts
from d3pack.format.codecs.prompts import encode_prompts as encode_prompts
from d3pack.format.codecs.prompts import encode_unconditional as encode_unconditional
from d3pack.format.codecs.table import ADAPTER_CODECS as ADAPTER_CODECS
from d3pack.format.codecs.table import LABEL_CODECS as LABEL_CODECS
from d3pack.format.codecs.table import PROMPT_CODECS as PROMPT_CODECS
from d3pack.format.codecs.weights import decode_weights as decode_weights
from d3pack.format.codecs.weights import encode_weights as encode_weights
