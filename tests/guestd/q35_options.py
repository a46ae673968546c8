"""Command lines of a PC that QEMU 11.1 refuses, and what it says; ``tests/interop`` asks it."""

from __future__ import annotations

_CHASSIS = "Bridge chassis not specified. Each bridge is required to be assigned a unique chassis id > 0."
_IDENTIFIER = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
UNKNOWN_MACHINE = 'unsupported machine type: "{}"\nUse -machine help to list supported machines'

LAST_DEVICE_REFUSED = [
    ("-device intel-iommu,aw-bits=40", "Legacy mode: supported values for aw-bits are: 39, 48"),
    ("-device intel-iommu,eim=on,intremap=off", "eim=on cannot be selected without intremap=on"),
    ("-device intel-iommu,fsts=on", "fsts is only available in scalable mode"),
    ("-device intel-iommu,svm=on", "Need to set device IOTLB for svm"),
    ("-device intel-iommu,scalable-mode=on,svm=on,device-iotlb=on", "Need to set fsts for svm"),
    ("-device intel-iommu,pasid-bits=8", "Need to set scalable mode for PASID"),
    (
        "-device intel-iommu,scalable-mode=on,pasid-bits=30",
        "PASID width 30 exceeds Max PASID Width 20 allowed in PCI spec",
    ),
    (
        "-device intel-iommu,scalable-mode=on,fsts=on,aw-bits=39",
        "Scalable mode(fsts=on): supported value for aw-bits is: 48",
    ),
    ("-device intel-iommu,bogus=1", "Property 'intel-iommu.bogus' not found"),
    ("-device intel-iommu,x-scalable-mode=on", "Property 'intel-iommu.x-scalable-mode' not found"),
    ("-device intel-iommu,aw-bits=foo", "Parameter 'aw-bits' expects integer"),
    ("-device intel-iommu,aw-bits=300", "Parameter 'aw-bits' expects uint8_t"),
    ("-device intel-iommu,caching-mode=maybe", "Parameter 'caching-mode' expects 'on' or 'off'"),
    ("-device intel-iommu,intremap=maybe", "Parameter 'intremap' does not accept value 'maybe'"),
    ("-device intel-iommu,id=x,addr=3", "Property 'intel-iommu.addr' not found"),
    ("-device intel-iommu,bus=pcie.0", "Device 'intel-iommu' can't go on PCIE bus"),
    ("-device intel-iommu,id=1a", f"Parameter 'id' expects an identifier\n{_IDENTIFIER}"),
    ("-device intel-iommu -device intel-iommu", "QEMU does not support multiple vIOMMUs for x86 yet."),
    (
        "-global intel-iommu.bogus=on -device intel-iommu",
        "can't apply global intel-iommu.bogus=on: Property 'intel-iommu.bogus' not found",
    ),
    ("-device edu,bus=nope", "Bus 'nope' not found"),
    ("-device pcie-root-port,id=a -device edu,bus=a.0", "Bus 'a.0' not found"),
    ("-device pcie-root-port,id=a -device pcie-root-port,id=b", "Can't add chassis slot, error -16"),
    ("-device pcie-root-port,id=a,chassis=256", "Parameter 'chassis' expects uint8_t"),
    ("-device pcie-root-port,id=a,hotplug=foo", "Parameter 'hotplug' expects 'on' or 'off'"),
    ("-device pcie-root-port,id=a,nonsense=1", "Property 'pcie-root-port.nonsense' not found"),
    (
        "-device pcie-root-port,id=a -device edu,bus=a,addr=0 -device edu,bus=a,addr=0",
        "PCI: slot 0 function 0 not available for edu, in use by edu,id=(null)",
    ),
    (
        "-device pcie-root-port,id=a,chassis=2 -device ioh3420,id=b,chassis=2",
        "Can't add chassis slot, error -16",
    ),
    ("-device x3130-upstream,id=a,chassis=1", "Property 'x3130-upstream.chassis' not found"),
    ("-device pci-bridge,id=a", _CHASSIS),
    ("-device pci-bridge,id=a,chassis_nr=0", _CHASSIS),
    ("-device pcie-pci-bridge,id=a,chassis_nr=1", "Property 'pcie-pci-bridge.chassis_nr' not found"),
    (
        "-device pxb-pcie,id=a,bus_nr=32 -device pxb-pcie,id=b,bus_nr=32",
        "PCI: Only PCI/PCIe bridges can be plugged into pxb-pcie",
    ),
    ("-device pxb-pcie,id=a,bus_nr=32 -device edu", "PCI: Only PCI/PCIe bridges can be plugged into pxb-pcie"),
    (
        "-device pxb-pcie,id=a,bus_nr=32 -device pxb-pcie,id=b,bus_nr=32,bus=pcie.0",
        "Bus 32 is already in use",
    ),
    (
        "-device pcie-root-port,id=a -device pxb-pcie,id=b,bus=a,bus_nr=4",
        "PXB devices can be attached only to root bus",
    ),
    ("-device pxb-pcie,id=a,bus_nr=300", "Parameter 'bus_nr' expects uint8_t"),
    ("-device edu,addr=0", "PCI: slot 0 function 0 not available for edu, in use by mch,id=(null)"),
    ("-device edu,addr=1f", "PCI: slot 31 function 0 not available for edu, in use by ICH9-LPC,id=(null)"),
    (
        "-device edu,id=p,addr=2 -device edu,id=q,addr=2",
        "PCI: slot 2 function 0 not available for edu, in use by edu,id=p",
    ),
    (
        "-device edu,addr=2 -device edu,addr=2.1",
        "PCI: single function device can't be populated in function 2.1",
    ),
    (
        "-device edu,addr=2.1 -device edu,addr=2.0",
        "PCI: 2.0 indicates single function, but 2.1 is already populated.",
    ),
    ("-device pcie-root-port,x-speed=7", "Parameter 'x-speed' does not accept value '7'"),
    ("-device pcie-root-port,x-width=3", "Parameter 'x-width' does not accept value '3'"),
    ("-device spapr-vlan", "'spapr-vlan' is not a valid device model name"),
]
"""What is said of the last device."""
REFUSED = [
    ("-machine q35,bogus=1", "Property 'pc-q35-11.1-machine.bogus' not found"),
    ("-machine q35,usb=foo", "Parameter 'usb' expects 'on' or 'off'"),
    ("-machine q35,default_bus_bypass_iommu=maybe", "Parameter 'default-bus-bypass-iommu' expects 'on' or 'off'"),
    ("-machine q35x", UNKNOWN_MACHINE.format("q35x")),
    ("-machine pseries", UNKNOWN_MACHINE.format("pseries")),
]
TAKEN = [
    "-device ioh3420,id=r -device x3130-upstream,id=u,bus=r -device xio3130-downstream,id=d,bus=u,chassis=3 "
    "-device edu,bus=d",
    "-machine q35,kernel-irqchip=split -device intel-iommu,intremap=on,eim=on",
    "-machine q35,default-bus-bypass-iommu=on,hpet=off,pit=off,sata=on,smm=off,acpi=off,vmport=off",
    "-M pc-q35-11.0 -smp 4 -cpu max -vga none",
    "-device pcie-root-port,id=a,chassis=1,slot=2,port=3 -device edu,bus=a -device edu,bus=a",
    "-device pcie-pci-bridge,id=b -device edu,bus=b -device i82801b11-bridge,id=c -device edu,bus=c,addr=1",
    "-device pci-bridge,id=b,chassis_nr=1 -device pci-bridge,chassis_nr=1,bus=b",
    "-device pxb-pcie,id=p,bus_nr=9 -device pcie-root-port,id=d,bus=pcie.0 -device pcie-root-port,bus=p,chassis=4",
    "-device intel-iommu,caching-mode=on,device-iotlb=on,scalable-mode=on,stale-tm=on,snoop-control=on",
]
