"""A step of nothing but our kernels: what it reads, which launches it takes, where they write."""
