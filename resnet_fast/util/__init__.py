"""What knows neither networks nor kernels: text, whole files, this machine, one clock."""
