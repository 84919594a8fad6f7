"""Whether the manifests of deploy/kubernetes agree with the code, the image and each other."""
