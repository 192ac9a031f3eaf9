// masked_forward
