"""Files to pixels and back, in one place: pictures (images.py) and video (video.py)."""

from common.images import contact_sheet, cover, from_bytes, read_image, to_bytes, to_tensor, to_uint8  # noqa: F401
from common.video import TooShort, count_frames, probe_video, read_frame, read_frames, read_video, write_video  # noqa: F401
