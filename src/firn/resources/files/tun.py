"""Network devices behind /dev/net/tun (images: TUNF entries, each with a REG entry of the same id).

State owned: which device a description is a queue of, and whether that queue is detached. A device that is not
persistent exists as long as such a description does, so it is state too: name, index, kind and flags, owner, header
sizes, buffer, offloads, hardware address, MTU, addresses, routes, its bridge. Kernel: TUNGETIFF and its kin
(Documentation/networking/tuntap.rst), /sys/class/net, ethtool, rtnetlink(7). The first description of a device makes
it again (TUNSETIFF) and sets it up, the others attach to it. A persistent device that is there is only attached to.

What goes wrong: the name is taken; the device is in another network namespace, or has a packet filter of a program.
What somebody else has configured on it is not kept: queueing disciplines, packet filter rules, sysctls, neighbours,
multicast memberships, routes with several hops; nor steering programs. Packets on their way are lost, as in a network.
"""

from __future__ import annotations

import errno
import fcntl
import os

from firn.abi import fcntl as fc
from firn.abi import nr, tun
from firn.errors import ImageError, RestoreError
from firn.host import links, sockdiag
from firn.resources.base import REG, TUNF, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import DumpContext, Open, RestoreContext
    from firn.tracee.program import Program

_NAME_SIZE = 16
_EBADFD = 77
_AF_INET, _ARPHRD_NONE, _ARPHRD_ETHER = 2, 65534, 1
_SETTABLE = 0x7133
"""IFF_TUN, TAP, NAPI, NAPI_FRAGS, MULTI_QUEUE, NO_PI, ONE_QUEUE, VNET_HDR: what TUNSETIFF takes of a device's flags."""
_NUMBERS = ("index", "mtu", "queue", "link", "owner", "group")
_KEYS = {"index": "ifindex", "queue": "tx_queue_len", "link": "type"}
_UNSET = 0xFFFFFFFF


class Tun(Kind):
    """Descriptions of /dev/net/tun."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._ready: set[str] = set()

    # -- dump --------------------------------------------------------------------------------------------------------

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The tunfile_entry; the first one of a device has its settings."""
        copy = open.copy()
        message: dict[str, Any] = {}
        try:
            told = fcntl.ioctl(copy, tun.TUNGETIFF, bytes(tun.IFREQ_FLAGS.size))
        except OSError as error:
            if error.errno != _EBADFD:  # it has no device
                raise
        else:
            raw, flags = tun.IFREQ_FLAGS.unpack(told)
            name = os.fsdecode(raw.split(b"\0")[0])
            message = {"netdev": name, "detached": bool(flags & tun.IFF_DETACH_QUEUE)}
            reason = self._why_not(name, copy)
            if reason:
                context.refuse(open, f"is the device {name}, {reason}", "close it before the dump")
                return None
            if name not in self._known:
                self._known.add(name)
                message["firn"] = _settings(name, copy)
        owner = context.owner(open)
        number = context.add_path(open.what, open.path, open.stat, {"flags": open.flags, "pos": 0, "fown": owner})
        return {"id": number, **message}

    @staticmethod
    def _why_not(name: str, copy: int) -> str:
        """Why a device cannot be saved; empty if it can."""
        namespace = fcntl.ioctl(copy, tun.TUNGETDEVNETNS)
        try:
            here = os.stat("/proc/self/ns/net")
            if (os.fstat(namespace).st_dev, os.fstat(namespace).st_ino) != (here.st_dev, here.st_ino):
                return "which is in another network namespace"
        finally:
            os.close(namespace)
        try:
            if any(fcntl.ioctl(copy, tun.TUNGETFILTER, bytes(16))[:2]):
                return "which has a packet filter (TUNATTACHFILTER)"
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is no tap device
                raise
        if links.number(name, "tun_flags") < 0:
            return "which /sys/class/net does not show: mount the sysfs of this network namespace there"
        if links.master(name) and not links.bridge(name):
            return f"which belongs to {links.master(name)}, that is no bridge"
        return ""

    # -- restore -----------------------------------------------------------------------------------------------------

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The description *number*, attached to its device if it was."""
        entry = context.message(REG, number)
        path, flags = entry["name"], entry["flags"]
        try:
            fd = os.open(path, flags & ~(fc.O_CREAT | fc.O_EXCL | fc.O_TRUNC | fc.FASYNC) | fc.O_CLOEXEC)
        except OSError as error:
            raise RestoreError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            # The tasks set owners by what the message of the file itself says.
            message |= {"fown": entry["fown"], "flags": flags}
            if message.get("netdev"):
                self._attach(fd, number, message, context)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _attach(self, fd: int, number: int, message: dict[str, Any], context: RestoreContext) -> None:
        name = message["netdev"]
        raw = os.fsencode(name)
        if not 0 < len(raw) < _NAME_SIZE or "/" in name or "\0" in name or name in (".", ".."):
            raise ImageError(f"files image: tun file {number} has the impossible device name {name!r}")
        saved = self._saved(name, context)
        there = links.number(name, "tun_flags")
        fresh = name not in self._ready and there < 0
        if fresh and not saved:
            raise RestoreError(f"the device {name} is not there, nor told by the checkpoint how it was", "make it")
        if name not in self._ready and there >= 0 and not there & tun.IFF_PERSIST:
            raise RestoreError(f"the device {name} is there already, and belongs to a program", "end that program")
        flags = saved.get("flags", 0) if fresh else there
        if fresh and saved.get("index"):
            # If something else has the index now, the device gets another one, as at each start of its program.
            _try(fd, tun.TUNSETIFINDEX, saved["index"].to_bytes(4, "little"))
        try:
            self._set_device(fd, raw, flags, fresh)
        except OSError as error:
            raise RestoreError(f"the device {name} cannot be attached: {error.strerror}") from None
        if fresh:
            try:
                _set_up(fd, name, saved)
            except OSError as error:
                raise RestoreError(f"the device {name} cannot be set up as it was: {error}") from None
        self._ready.add(name)
        if fresh and flags & tun.IFF_PERSIST:
            message["persist"] = True
        if message.get("detached") and flags & tun.IFF_MULTI_QUEUE:
            fcntl.ioctl(fd, tun.TUNSETQUEUE, tun.IFREQ_FLAGS.pack(b"", tun.IFF_DETACH_QUEUE))

    def plan(self, program: Program, fd: int, message: dict[str, Any]) -> None:
        """A persistent device becomes so late: until then it goes away if the restore fails."""
        if message.get("persist"):
            program.call(f"TUNSETPERSIST of descriptor {fd}", nr.ioctl, fd, tun.TUNSETPERSIST, 1)

    @staticmethod
    def _set_device(fd: int, raw: bytes, flags: int, fresh: bool) -> None:
        request = tun.IFREQ_FLAGS.pack(raw, flags & _SETTABLE)
        try:
            fcntl.ioctl(fd, tun.TUNSETIFF, request)
        except OSError as error:
            if not fresh or error.errno != errno.EBUSY:
                raise
            # The number that was wished for is taken: 0 leaves the choice to the kernel.
            fcntl.ioctl(fd, tun.TUNSETIFINDEX, bytes(4))
            fcntl.ioctl(fd, tun.TUNSETIFF, request)

    @staticmethod
    def _saved(name: str, context: RestoreContext) -> dict[str, Any]:
        """The settings of device *name*, which one of its files has."""
        for (kind, _), entry in context.files.items():
            if kind == TUNF and entry["tunf"].get("netdev") == name and "firn" in entry["tunf"]:
                found: dict[str, Any] = entry["tunf"]["firn"]
                return found
        return {}


def _settings(name: str, copy: int) -> dict[str, Any]:
    """The firn_tun message of a device."""
    found: dict[str, Any] = {key: links.number(name, _KEYS.get(key, key)) & _UNSET for key in _NUMBERS}
    found |= {
        "flags": links.number(name, "tun_flags"), "state": links.number(name, "flags"),
        "carrier": links.attribute(name, "carrier") != "0", "alias": links.attribute(name, "ifalias"),
        "bridge": links.bridge(name), "offload": links.offloads(name),
        "sndbuf": int.from_bytes(fcntl.ioctl(copy, tun.TUNGETSNDBUF, bytes(4)), "little"),
        "header": int.from_bytes(fcntl.ioctl(copy, tun.TUNGETVNETHDRSZ, bytes(4)), "little"),
        "little_endian": any(fcntl.ioctl(copy, tun.TUNGETVNETLE, bytes(4))),
        "addresses": links.addresses(found["index"]), "routes": links.routes(found["index"]),
    }  # fmt: skip
    if found["link"] == _ARPHRD_ETHER:
        found["mac"] = bytes.fromhex(links.attribute(name, "address").replace(":", ""))
    return found


def _try(fd: int, request: int, value: bytes) -> None:
    """An ioctl that may fail."""
    try:
        fcntl.ioctl(fd, request, value)
    except OSError:
        return


def _set_up(fd: int, name: str, saved: dict[str, Any]) -> None:
    """Give the new device *name* its settings."""
    if saved.get("link", _UNSET) not in (_ARPHRD_NONE, _ARPHRD_ETHER, _UNSET):
        fcntl.ioctl(fd, tun.TUNSETLINK, saved["link"])
    for request, key in ((tun.TUNSETOWNER, "owner"), (tun.TUNSETGROUP, "group")):
        if saved.get(key, _UNSET) != _UNSET:
            fcntl.ioctl(fd, request, saved[key])
    for request, key in ((tun.TUNSETSNDBUF, "sndbuf"), (tun.TUNSETVNETHDRSZ, "header")):
        if saved.get(key):
            fcntl.ioctl(fd, request, saved[key].to_bytes(4, "little"))
    if saved.get("little_endian"):
        fcntl.ioctl(fd, tun.TUNSETVNETLE, (1).to_bytes(4, "little"))
    fcntl.ioctl(fd, tun.TUNSETOFFLOAD, saved.get("offload", 0))
    _set_up_link(name, saved)
    if not saved.get("carrier", True):
        fcntl.ioctl(fd, tun.TUNSETCARRIER, bytes(4))


def _set_up_link(name: str, saved: dict[str, Any]) -> None:
    """What any network device has."""
    import _socket

    raw, index = os.fsencode(name), _socket.if_nametoindex(name)
    channel = _socket.socket(_AF_INET, _socket.SOCK_DGRAM | sockdiag.SOCK_CLOEXEC)
    try:
        ioctl = channel.fileno()
        if saved.get("mac"):
            fcntl.ioctl(ioctl, tun.SIOCSIFHWADDR, tun.IFREQ_ADDRESS.pack(raw, _ARPHRD_ETHER, saved["mac"]))
        for request, key in ((tun.SIOCSIFMTU, "mtu"), (tun.SIOCSIFTXQLEN, "queue")):
            if saved.get(key, _UNSET) != _UNSET:
                fcntl.ioctl(ioctl, request, tun.IFREQ_NUMBER.pack(raw, saved[key]))
        if saved.get("alias"):
            _write(f"/sys/class/net/{name}/ifalias", saved["alias"])
        if any(address[:1] == b"\x0a" and address[3:4] == b"\xfd" for address in saved.get("addresses", [])):
            # It has its link-local address already (family AF_INET6, scope 253): the kernel shall not make another.
            _write(f"/proc/sys/net/ipv6/conf/{name}/addr_gen_mode", "1")
        if saved.get("bridge"):
            fcntl.ioctl(ioctl, tun.SIOCBRADDIF, tun.IFREQ_NUMBER.pack(os.fsencode(saved["bridge"]), index))
        fcntl.ioctl(ioctl, tun.SIOCSIFFLAGS, tun.IFREQ_FLAGS.pack(raw, saved.get("state", 0) & tun.IFF_SETTABLE))
    finally:
        channel.close()
    _set_up_network(index, saved)


def _set_up_network(index: int, saved: dict[str, Any]) -> None:
    """Addresses and routes."""
    for address in saved.get("addresses", []):
        head = tun.IFADDRMSG.unpack_from(address)[:4]
        try:
            _tell("address", tun.RTM_NEWADDR, tun.IFADDRMSG.pack(*head, index) + address[tun.IFADDRMSG.size :])
        except FileExistsError:
            continue  # the kernel was faster
    for route in saved.get("routes", []):
        _tell("route", tun.RTM_NEWROUTE, _through(route, index))


def _through(route: bytes, index: int) -> bytes:
    """The same route through device *index*."""
    old, named = links.out_device(route)
    if not named:
        raise ImageError("files image: a route of a tun device leads nowhere")
    wanted = (8).to_bytes(2, "little") + tun.RTA_OIF.to_bytes(2, "little")
    return route.replace(wanted + old.to_bytes(4, "little"), wanted + index.to_bytes(4, "little"))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, os.fsencode(text))
    finally:
        os.close(fd)


def _tell(what: str, kind: int, payload: bytes) -> None:
    """Have the kernel make something that must not be there yet (rtnetlink(7)); OSError if it does not."""
    flags = sockdiag.NLM_F_REQUEST | tun.NLM_F_ACK | tun.NLM_F_CREATE | tun.NLM_F_EXCL
    sockdiag.ask(what, payload, kind, flags, tun.NETLINK_ROUTE)
