"""Other systems that do this server's job, each as it is installed and run by its own notes."""
