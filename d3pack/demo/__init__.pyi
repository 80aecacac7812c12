# The public names of d3pack.demo; each is imported when it is first used.

from d3pack.demo.photographs import Photographs as Photographs
from d3pack.demo.photographs import example_figures as example_figures
from d3pack.demo.photographs import example_pack as example_pack
from d3pack.demo.run import NAMES as NAMES
from d3pack.demo.run import SETTINGS as SETTINGS
from d3pack.demo.run import Demo as Demo
from d3pack.demo.run import run_demo as run_demo
