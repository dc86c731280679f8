from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX
