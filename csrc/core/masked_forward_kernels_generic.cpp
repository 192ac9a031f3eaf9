// masked forward kernels: generic
