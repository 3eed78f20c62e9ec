"""What runs before the package is there: release pins and the Horovod build."""
