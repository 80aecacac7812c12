# The public names of d3pack.evaluate; each is imported when it is first used.

from d3pack.evaluate.baselines import BASELINES as BASELINES
from d3pack.evaluate.bench import Bench as Bench
from d3pack.evaluate.bench import EntryResult as EntryResult
from d3pack.evaluate.entries import Entry as Entry
from d3pack.evaluate.entries import PayloadFormat as PayloadFormat
from d3pack.evaluate.evaluation import Evaluation as Evaluation
from d3pack.evaluate.evaluation import evaluate as evaluate
from d3pack.evaluate.evaluation import evaluate_shard as evaluate_shard
from d3pack.evaluate.report import report_path as report_path
from d3pack.evaluate.report import write_report as write_report
from d3pack.evaluate.settings import EvalSettings as EvalSettings
from d3pack.students import PROTOCOLS as PROTOCOLS
from d3pack.students import STUDENTS as STUDENTS
from d3pack.students import LabelledImages as LabelledImages
from d3pack.students import Protocol as Protocol
from d3pack.students import Updates as Updates
