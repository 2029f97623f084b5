"""Servers on TCP and UDP under load, checkpointed and restored under the hands of clients outside the tree.

The clients check every answer and must not notice more than a pause.
"""

from __future__ import annotations

import ftplib
import random
import shutil
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from clients.protocols import Client, Dns, Http, Maria, Memcached, Redis
from harness import Runner, Target, firn_command, low_numbers_in_use, wait_until
from programs import (
    PATIENCE,
    Load,
    as_user,
    cycle,
    descendants,
    end,
    folder_of,
    free_port,
    postgresql_folder,
    program,
    reap,
    tail,
    under_load,
    wait_for,
    wait_for_port,
)

pytestmark = pytest.mark.skipif(firn_command() is None, reason="no firn command (set FIRN or make the venv)")


class Generator:
    """A load generator outside the tree, which has its own opinion on whether all went well."""

    def __init__(self, runner: Runner, *command: str | Path) -> None:
        self._output = runner.folder / "generator"
        with self._output.open("wb") as stream:
            self._process = subprocess.Popen(
                [str(word) for word in command], cwd=runner.folder, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=stream, env=runner.environment,
            )  # fmt: skip

    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self, number: int = 0) -> str:
        """What it printed when it has ended, by itself or because of a signal; it must have been content."""
        if number:
            self._process.send_signal(number)
        assert self._process.wait(PATIENCE) == 0, tail(self._output)
        return tail(self._output)


def test_redis(runner: Runner) -> None:
    port = free_port()
    server = runner.spawn([program("redis-server"), "--port", str(port), "--save", ""])
    wait_for_port(port, server)
    server = under_load(runner, server, Load(lambda: Redis(("127.0.0.1", port)), 3))
    end(server)


def test_memcached(runner: Runner) -> None:
    port = free_port()
    server = runner.spawn([program("memcached"), "-u", "root", "-l", "127.0.0.1", "-p", str(port)])
    wait_for_port(port, server)
    server = under_load(runner, server, Load(lambda: Memcached(("127.0.0.1", port)), 3))
    end(server)


PAGE = "".join(f"line {number}\n" for number in range(3000))
NGINX = """
daemon off;
user root;
worker_processes 2;
pid {folder}/pid;
error_log {folder}/errors;
events {{ worker_connections 64; }}
http {{
    access_log off;
    keepalive_requests 10000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    sendfile on;
    server {{ listen 127.0.0.1:{port}; root {folder}/files; }}
}}
"""


def _files(folder: Path) -> None:
    (folder / "files").mkdir()
    (folder / "files" / "page").write_text(PAGE)


def _http(port: int) -> Client:
    client = Http(("127.0.0.1", port))
    client.wanted = PAGE.encode()
    return client


def _nginx(runner: Runner) -> tuple[Target, int]:
    port = free_port()
    _files(runner.folder)
    (runner.folder / "nginx.conf").write_text(NGINX.format(folder=runner.folder, port=port))
    server = runner.spawn([program("nginx"), "-p", runner.folder, "-c", runner.folder / "nginx.conf",
                           "-e", runner.folder / "errors"])  # fmt: skip
    wait_for_port(port, server)
    return server, port


def test_nginx(runner: Runner) -> None:
    server, port = _nginx(runner)
    server = under_load(runner, server, Load(lambda: _http(port), 3))
    end(server)


APACHE = """
ServerRoot {folder}
ServerName localhost
PidFile {folder}/pid
ErrorLog {folder}/errors
DefaultRuntimeDir {folder}
Listen 127.0.0.1:{port}
User www-data
Group www-data
LoadModule mpm_{model}_module {modules}/mod_mpm_{model}.so
LoadModule authz_core_module {modules}/mod_authz_core.so
KeepAlive On
KeepAliveTimeout 60
MaxKeepAliveRequests 0
StartServers 2
DocumentRoot {folder}/files
"""


@pytest.mark.parametrize("model", ["prefork", "event"])
def test_apache(model: str, runner: Runner) -> None:
    command = program("apache2")
    port = free_port()
    with folder_of("www-data") as folder:
        _files(folder)
        config = APACHE.format(folder=folder, port=port, model=model, modules="/usr/lib/apache2/modules")
        (folder / "apache.conf").write_text(config)
        server = runner.spawn([command, "-D", "FOREGROUND", "-f", folder / "apache.conf"])
        wait_for_port(port, server)
        server = under_load(runner, server, Load(lambda: _http(port), 3))
        end(server)


def test_dnsmasq(runner: Runner) -> None:
    command = program("dnsmasq")
    port = free_port()
    (runner.folder / "hosts").write_text("".join(f"10.0.0.{number} host{number}.test\n" for number in range(100)))
    server = runner.spawn(
        [command, "-k", "-C", "/dev/null", "-p", str(port), "-R", "-h", "-H", runner.folder / "hosts", "-u", "root",
         "-a", "127.0.0.1", "-z", "-x", runner.folder / "pid"]
    )  # fmt: skip
    wait_for_port(port, server)
    server = under_load(runner, server, Load(lambda: Dns(("127.0.0.1", port)), 2))
    end(server)


def test_mariadb(runner: Runner) -> None:
    """Transactions of three clients; afterwards the tables are checked."""
    command, install = program("mariadbd"), program("mariadb-install-db")
    port = free_port()
    with folder_of("mysql") as folder:
        subprocess.run(
            [install, "--no-defaults", "--user=mysql", f"--datadir={folder}/data", "--innodb-log-file-size=4M",
             "--skip-name-resolve", "--auth-root-authentication-method=normal"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Asynchronous input and output by io_uring, its default, cannot be saved.
        server = runner.spawn(
            [command, "--no-defaults", "--user=mysql", f"--datadir={folder}/data", f"--socket={folder}/socket",
             "--bind-address=127.0.0.1", f"--port={port}", "--innodb-use-native-aio=0", "--innodb-log-file-size=4M",
             "--innodb-buffer-pool-size=8M", "--key-buffer-size=1M", "--performance-schema=0", "--skip-name-resolve",
             f"--pid-file={folder}/pid"],
            stderr=runner.folder / "errors",
        )  # fmt: skip
        wait_for_port(port, server)
        server = under_load(runner, server, Load(lambda: Maria(("127.0.0.1", port)), 3), "--file-locks")
        end(server)


TOMCAT = """
<Server port="-1">
  <Service name="Catalina">
    <Connector port="{port}" address="127.0.0.1" protocol="HTTP/1.1" keepAliveTimeout="60000"
               maxKeepAliveRequests="-1"/>
    <Engine name="Catalina" defaultHost="localhost">
      <Host name="localhost" appBase="webapps" unpackWARs="false" autoDeploy="false"/>
    </Engine>
  </Service>
</Server>
"""


def test_tomcat(runner: Runner) -> None:
    """A server in a Java virtual machine: a pool of threads around epoll."""
    java, home = program("java"), Path("/usr/share/tomcat10")
    if not (home / "bin" / "bootstrap.jar").exists():
        pytest.skip("tomcat10 is not installed")
    port, base = free_port(), runner.folder
    for name in ("conf", "logs", "temp", "work", "webapps/ROOT"):
        (base / name).mkdir(parents=True)
    (base / "webapps" / "ROOT" / "page").write_text(PAGE)
    (base / "conf" / "server.xml").write_text(TOMCAT.format(port=port))
    shutil.copy("/etc/tomcat10/web.xml", base / "conf")
    jars = f"{home}/bin/bootstrap.jar:{home}/bin/tomcat-juli.jar"
    server = runner.spawn(
        [java, "-XX:-UsePerfData", "-Xmx64m", "-XX:TieredStopAtLevel=1", f"-Dcatalina.home={home}",
         f"-Dcatalina.base={base}", f"-Djava.io.tmpdir={base}/temp", "-cp", jars,
         "org.apache.catalina.startup.Bootstrap", "start"],
        stdout=base / "output", stderr=base / "errors",
    )  # fmt: skip
    wait_for_port(port, server)
    server = under_load(runner, server, Load(lambda: _http(port), 3))
    end(server)


def _under_generator(runner: Runner, server: Target, generator: Generator, *options: str) -> Target:
    """Checkpoints while a load generator works, two if it takes that long."""
    for number in range(2):
        time.sleep(0.3)
        if number and not generator.runs():
            break
        server = cycle(runner, server, "--tcp-established", *options)
    return server


def test_redis_benchmark(runner: Runner) -> None:
    command, port = program("redis-benchmark"), free_port()
    server = runner.spawn([program("redis-server"), "--port", str(port), "--save", "", "--appendonly", "no"])
    wait_for_port(port, server)
    generator = Generator(runner, command, "-p", str(port), "-n", "15000", "-c", "20", "-t", "set,get,lpush",
                          "-r", "1000", "--csv")  # fmt: skip
    server = _under_generator(runner, server, generator)
    printed = generator.end()
    assert [line.split(",")[0] for line in printed.splitlines()[1:]] == ['"SET"', '"GET"', '"LPUSH"'], printed
    end(server)


def test_nginx_under_wrk(runner: Runner) -> None:
    command = program("wrk")
    server, port = _nginx(runner)
    generator = Generator(runner, command, "-t", "1", "-c", "20", "-d", "60s", "--timeout", "30s",
                          f"http://127.0.0.1:{port}/page")  # fmt: skip
    server = _under_generator(runner, server, generator)
    time.sleep(0.3)
    printed = generator.end(signal.SIGINT)
    assert "requests in" in printed and "errors" not in printed and "Non-2xx" not in printed, printed
    end(server)


def test_postgresql_under_pgbench(runner: Runner) -> None:
    """Four clients' transactions; afterwards the sums that pgbench keeps must agree with its history."""
    postgres, initdb, pgbench, psql = (program(name) for name in ("postgres", "initdb", "pgbench", "psql"))
    port = free_port()
    with postgresql_folder() as folder:
        data = folder / "data"
        user = as_user("postgres")
        subprocess.run([*user, initdb, "-D", data, "-A", "trust", "-N", "--no-instructions"], check=True,
                       stdout=subprocess.DEVNULL, cwd=folder)  # fmt: skip
        server = runner.spawn([*user, postgres, "-D", data, "-k", folder, "-p", str(port)],
                              stderr=runner.folder / "errors")  # fmt: skip
        wait_until("the server is ready", lambda: "ready" in tail(data / "postmaster.pid"), PATIENCE)
        where = ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
        subprocess.run([pgbench, *where, "-i", "-q", "postgres"], check=True, stderr=subprocess.DEVNULL)
        generator = Generator(runner, pgbench, *where, "-n", "-c", "4", "-j", "1", "-t", "150", "postgres")
        server = _under_generator(runner, server, generator)
        printed = generator.end()
        assert "number of transactions actually processed: 600/600" in printed, printed
        assert "number of failed transactions: 0" in printed, printed
        sums = " UNION ALL ".join(
            f"SELECT {what} FROM pgbench_{table}"
            for table, what in (("accounts", "sum(abalance)"), ("tellers", "sum(tbalance)"),
                                ("branches", "sum(bbalance)"), ("history", "sum(delta)"), ("history", "count(*)"))
        )  # fmt: skip
        found = subprocess.run([psql, *where, "-X", "-A", "-t", "-c", sums, "postgres"], check=True,
                               capture_output=True, text=True).stdout.split()  # fmt: skip
        assert len(set(found[:4])) == 1 and found[4] == "600", found
        end(server)


VSFTPD = """
listen=YES
listen_ipv6=NO
listen_address=127.0.0.1
listen_port={port}
background=NO
anonymous_enable=YES
no_anon_password=YES
anon_root={folder}/files
ftp_username=daemon
secure_chroot_dir={folder}/empty
isolate=NO
isolate_network=NO
seccomp_sandbox=NO
pasv_min_port={passive}
pasv_max_port={passive}
"""


def test_vsftpd_in_the_middle_of_a_large_download(runner: Runner) -> None:
    command = program("vsftpd")
    port, passive = free_port(), free_port()
    with folder_of("root") as folder:
        folder.chmod(0o755)
        (folder / "empty").mkdir()
        (folder / "files").mkdir()
        large = random.Random(3).randbytes(24 << 20)
        (folder / "files" / "large").write_bytes(large)
        config = folder / "vsftpd.conf"
        config.write_text(VSFTPD.format(folder=folder, port=port, passive=passive))
        server = runner.spawn([command, config])
        wait_for_port(port, server)
        with closing(ftplib.FTP()) as client:
            client.connect("127.0.0.1", port, PATIENCE)
            client.login()
            received = bytearray()
            with client.transfercmd("RETR large") as data:
                data.settimeout(PATIENCE)
                for part in (8 << 20, 16 << 20, 25 << 20):
                    while len(received) < part and (got := data.recv(1 << 16)):
                        received += got
                    if part < len(large):
                        server = cycle(runner, server, "--tcp-established", "--file-locks")
            members = descendants(server.pid)
            assert client.voidresp().startswith("226")
            assert received == large
            assert client.size("large") == len(large)
        reap(members)
        end(server)


SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
"""


@pytest.mark.xdist_group("terminals")
def test_ssh_session(runner: Runner) -> None:
    """A shell on a terminal, through sshd's two processes for the session, typed to before and after."""
    sshd, ssh, keygen = program("sshd"), program("ssh"), program("ssh-keygen")
    folder, port = runner.folder, free_port()
    # The place where sshd confines its part without privileges; the package's service makes it.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "key"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd.conf").write_text(SSHD.format(folder=folder, port=port))
    server = runner.spawn([sshd, "-D", "-e", "-f", folder / "sshd.conf"], stderr=folder / "errors")
    wait_for_port(port, server)
    with low_numbers_in_use():
        client = subprocess.Popen(
            [ssh, "-tt", "-F", "none", "-p", str(port), "-i", folder / "key", "-o", "StrictHostKeyChecking=no", "-o",
             "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@127.0.0.1", "exec bash --norc"],
            stdin=subprocess.PIPE, stdout=(folder / "session").open("wb"),
            stderr=(folder / "session-errors").open("wb"),
        )  # fmt: skip
        wait_until("its shell runs", lambda: "bash" in descendants(server.pid).values(), PATIENCE)
    assert client.stdin
    for number in range(3):
        client.stdin.write(b"x=$((x + %d)); echo the sum is $x; stty -echo\n" % (number + 5))
        client.stdin.flush()
        wait_for(folder / "session", f"the sum is {(5, 11, 18)[number]}")
        if number < 2:
            server = cycle(runner, server, "--tcp-established")
    members = descendants(server.pid)
    client.stdin.write(b"exit 7\n")
    client.stdin.close()
    assert client.wait(PATIENCE) == 7, tail(folder / "session-errors")
    reap(members)
    end(server)
