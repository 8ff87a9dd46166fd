"""What an algorithm is handed: a batch, one client's examples, and what a cohort sent."""

from bench.data.batch import Batch as Batch
from bench.data.images import AUGMENTATIONS as AUGMENTATIONS
from bench.data.images import Images as Images
from bench.data.local import LocalData as LocalData
from bench.data.local import Meter as Meter
from bench.data.uploads import Uploads as Uploads
