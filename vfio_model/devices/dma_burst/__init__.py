"""dma_burst: this project's DMA load generator."""
