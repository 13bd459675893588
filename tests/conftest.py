"""What every test shares: no network, and one thread so that results do not depend on the machine's cores."""

import os

# Before transformers or diffusers are imported: a test that wants a download is a test that fails.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
