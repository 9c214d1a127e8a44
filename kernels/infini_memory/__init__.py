"""The Infini memory: read the running means of all that is older, mix with the local output, write."""
