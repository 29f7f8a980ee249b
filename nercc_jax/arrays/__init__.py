"""What all rooms stand on: arrays of NumPy or JAX, their files, and checks.

It is for the other rooms, which import from here, and has no public names.
"""

from ._checks import check_count as check_count
from ._checks import check_counts as check_counts
from ._checks import check_fields as check_fields
from ._checks import check_not_negative as check_not_negative
from ._checks import check_positive as check_positive
from ._files import NO_CHECKSUM as NO_CHECKSUM
from ._files import read_arrays as read_arrays
from ._files import read_checked as read_checked
from ._files import read_entries as read_entries
from ._files import write_arrays as write_arrays
from ._files import write_checked as write_checked
from ._files import write_entries as write_entries
from ._namespace import constant as constant
from ._namespace import jitted as jitted
from ._namespace import namespace as namespace
from ._namespace import native as native
from ._namespace import product as product
from ._namespace import root_mean_square as root_mean_square
from ._namespace import safe_sqrt as safe_sqrt
from ._namespace import taken as taken
from ._namespace import where as where
from ._namespace import working_dtype as working_dtype

__all__ = []  # nothing for users
