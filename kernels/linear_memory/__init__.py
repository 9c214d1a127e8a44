"""The linear memory: running means of phi(k)^T v and phi(k), written block by block, read before written."""
