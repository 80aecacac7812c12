# The public names of d3pack.students; each is imported when it is first used.

from d3pack.students.images import LabelledImages as LabelledImages
from d3pack.students.networks import STUDENTS as STUDENTS
from d3pack.students.protocols import DD_RANKING as DD_RANKING
from d3pack.students.protocols import HELD_BACK as HELD_BACK
from d3pack.students.protocols import PILOT_SHARE as PILOT_SHARE
from d3pack.students.protocols import PROTOCOLS as PROTOCOLS
from d3pack.students.protocols import RANKED as RANKED
from d3pack.students.protocols import Intervals as Intervals
from d3pack.students.protocols import Protocol as Protocol
from d3pack.students.protocols import Resample as Resample
from d3pack.students.protocols import Updates as Updates
from d3pack.students.protocols import held_back as held_back
from d3pack.students.real import RealImages as RealImages
from d3pack.students.real import common_size as common_size
from d3pack.students.training import History as History
from d3pack.students.training import fit as fit
from d3pack.students.training import lengths as lengths
from d3pack.students.training import seconds_needed as seconds_needed
from d3pack.students.training import statistics as statistics
from d3pack.students.training import train_student as train_student
