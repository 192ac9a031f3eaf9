// masked forward kernels: avx2
