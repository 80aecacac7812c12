# The public names of d3pack.preview; each is imported when it is first used.

from d3pack.preview.page import bar as bar
from d3pack.preview.page import document as document
from d3pack.preview.page import html_text as html_text
from d3pack.preview.page import render_page as render_page
from d3pack.preview.page import table as table
from d3pack.preview.serve import viewer_address as viewer_address
from d3pack.preview.serve import viewer_directory as viewer_directory
from d3pack.preview.serve import viewer_networks as viewer_networks
from d3pack.preview.serve import viewer_server as viewer_server
from d3pack.preview.sheet import Row as Row
from d3pack.preview.sheet import Sample as Sample
from d3pack.preview.sheet import contact_sheet as contact_sheet
from d3pack.preview.sheet import render_sheet as render_sheet
from d3pack.preview.sheet import sample as sample
