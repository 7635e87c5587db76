"""Load on a running OpenAI-compatible server, and what it made of it: the parts of `softprompt bench`."""
