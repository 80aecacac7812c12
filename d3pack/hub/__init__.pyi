# The public names of d3pack.hub; each is imported when it is first used.

from d3pack.hub.address import Address as Address
from d3pack.hub.address import ObjectAddress as ObjectAddress
from d3pack.hub.address import is_address as is_address
from d3pack.hub.address import parse_address as parse_address
from d3pack.hub.download import Pulled as Pulled
from d3pack.hub.download import RemoteInfo as RemoteInfo
from d3pack.hub.download import is_remote as is_remote
from d3pack.hub.download import load as load
from d3pack.hub.download import load_named as load_named
from d3pack.hub.download import pull as pull
from d3pack.hub.download import read_classes as read_classes
from d3pack.hub.download import remote_info as remote_info
from d3pack.hub.publish import Parcel as Parcel
from d3pack.hub.publish import Pushed as Pushed
from d3pack.hub.publish import check_login as check_login
from d3pack.hub.publish import prepare_push as prepare_push
from d3pack.hub.publish import push as push
from d3pack.hub.publish import send_push as send_push
from d3pack.hub.settings import PushSettings as PushSettings
from d3pack.hub.settings import Trust as Trust
