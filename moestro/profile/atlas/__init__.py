"""The atlas: what a profile says, as one self-contained page, as pictures, and as the plain data behind both."""
