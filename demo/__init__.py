"""The page to play with: app.py starts it, page.py lays it out, studio.py makes the videos."""

import common  # noqa: F401 (before torch: sets the wait policy of its threads)
