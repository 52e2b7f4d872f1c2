"""Files to pixels and back, in one place: pictures (images.py) and video (video.py)."""

from common.images import contact_sheet as contact_sheet
from common.images import cover as cover
from common.images import from_bytes as from_bytes
from common.images import read_image as read_image
from common.images import to_bytes as to_bytes
from common.images import to_tensor as to_tensor
from common.images import to_uint8 as to_uint8
from common.video import TooShort as TooShort
from common.video import count_frames as count_frames
from common.video import probe_video as probe_video
from common.video import read_frame as read_frame
from common.video import read_frames as read_frames
from common.video import read_video as read_video
from common.video import write_video as write_video
