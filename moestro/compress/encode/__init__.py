"""Methods that put a weight matrix into few bits. Each returns tiles that the kernels run as they are."""
