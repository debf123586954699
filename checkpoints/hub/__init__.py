"""The Hugging Face hub: `hf://org/name[@revision][/path]` as a folder, and folders as repositories.

- `download.py`: which files of a repository a checkpoint needs, and the folder they lie in
- `upload.py`: a converted folder as a repository, checked before the conversion starts

`checkpoints/open.py` and `checkpoints/tokenizer.py` import the first, the commands the second. All
that goes over the network is huggingface_hub's work: its cache, its token, its variables
(HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""
