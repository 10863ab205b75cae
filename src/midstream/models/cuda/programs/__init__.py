"""The programs in Triton's language, and launching them. Only where Triton is: it comes with torch's CUDA wheels."""
