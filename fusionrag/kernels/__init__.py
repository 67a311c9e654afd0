"""Compute kernels. Each file holds the public function and, beside any accelerated body, its plain-torch reference."""
