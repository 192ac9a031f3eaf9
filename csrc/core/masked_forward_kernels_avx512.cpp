// masked forward kernels: avx512
